"""What is measured of generated pictures, by networks that had no part in making or retrieving them."""
