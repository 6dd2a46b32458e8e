"""The site, and the code of its figures."""
