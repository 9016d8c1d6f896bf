"""The page of a sweep: one file that is opened, filtered and printed, and the files beside it."""
