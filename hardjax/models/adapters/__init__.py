"""One adapter a framework: how its networks are made, called and switched between training and evaluation."""
