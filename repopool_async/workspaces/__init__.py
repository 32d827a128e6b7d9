"""How a tree comes to be and becomes clean again."""
