"""How fast everything is, each part beside another way to do the same, in one run: python -m train.benchmark"""
