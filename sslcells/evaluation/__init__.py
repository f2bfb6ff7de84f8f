"""How good an encoder is: features of whole splits, and the figures, pictures and reports made from them."""
