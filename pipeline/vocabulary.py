"""Words that recipes, chains and tables of results share. A report reads them without torch."""

# What the scope of a method compresses of all channels: filters of convolutions, neurons of linear layers.
UNITS = ("all", "filters", "neurons")
# A tail is the chain behind a compression; these are the names that `stages=` has for some. A stage that a network has
# nothing for (repair without BatchNorm) is left out of a named tail; where it is the last one, the tail has no rows.
TAILS = {"raw": "", "repaired": "repair", "norm_tuned": "repair > tune_norms", "tuned": "repair > tune"}
