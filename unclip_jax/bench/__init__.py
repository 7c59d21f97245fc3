"""`unclip bench sharding`: training steps, measured on the devices at hand under many strategies.

command    `unclip bench`
cases      devices x strategies x batches x recomputation, and which of them make no sense
runner     case after case, each in a process of its own, into a file that is gone on with
worker     that process: compiles the real training step and times it
predicted  what `plan` says of the same case, where it knows the chip
report     the file's rows as a table and as a plot
"""
