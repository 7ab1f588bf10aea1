"""What training costs: products counted by part, parameters, bytes; tables of them."""
