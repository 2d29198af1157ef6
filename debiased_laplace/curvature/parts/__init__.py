"""Parts of a basis, a file for each kind of directions; what is asked of them, they answer for themselves."""
