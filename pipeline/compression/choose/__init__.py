"""Choice of the channels or weights that go: methods and masks, and the measurements that they look at."""
