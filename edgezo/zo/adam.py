"""Constants of Adam (arXiv 1412.6980), as every engine has them."""

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
