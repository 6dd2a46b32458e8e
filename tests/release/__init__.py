"""What a release hands out: built, installed and tried outside the tree by ``python run.py release``."""
