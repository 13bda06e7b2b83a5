"""Small data sets that come with the package, one folder each with train/ and test/; `draw` made cifar10-mini."""
