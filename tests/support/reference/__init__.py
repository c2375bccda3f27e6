"""Small reference networks in the original checkpoint layout, in plain torch."""
