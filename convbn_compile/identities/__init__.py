"""The identities, one file each; s is a per-output-channel scale, g a grad_output, w (*) x a convolution.

    (1) scale_of_output            s . (w (*) x) = (s . w) (*) x
    (2) scale_in_grad_input        grad_input(s . g, w) = grad_input(g, s . w)
    (3) scale_in_grad_weight       grad_weight(s . g, x) = s . grad_weight(g, x)
    (4) inner_product_with_output  <g, w (*) x>_c = <grad_weight(g, x), w>_c          for each output channel c
    (5) sum_of_branches            sum of w_k (*) x = merge(w_k) (*) x

and the theorem that puts them together and is what the joint pass rewrites:

    affine_of_linear               sum of s_k . (w_k (*) x + b_k) + t = W (*) x + b',  with all its gradients

and five of their own, which free what the activation after a norm would save:

    (6) mask_of_clamp              (x <= a) | (x >= b) = (z <= a) | (z >= b)    for z = clamp(x, a, b)
    (7) crop_of_pad                x = crop(pad(x, p), p)
    (8) shape_of_input             grad_input(g, w, x) = grad_input(g, w, e)    for any e of the shape of x
    (9) bits_of_mask               m = unpack(pack(m))
    (10) sign_of_output            (x > 0) = (z > 0),  exp(c x) = z / n + 1     for z = leaky ReLU, ELU of x
"""
