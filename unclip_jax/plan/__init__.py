"""Plans of training and sampling on TPUs that are not here, by the real TPU compiler.

slices     names of TPU slices -> chips, torus, memory, peaks and bandwidths
steps      config -> the jitted step and the shapes that it is called with
flops      a traced step -> FLOPs, loops multiplied out, by module
worker     the child process that traces and compiles
compiler   request -> what the compiler said, cached; stops it after buffer assignment
dump       the compiler's text -> memory, collectives, FLOPs, traffic
blocks     efficiencies of blocks compiled to the end on one chip
roofline   all of it -> seconds
report     a plan as text, JSON or a row
sweep      many plans, ranked
kept       the plans that the repository keeps
scaling    bytes over the interconnect from 8 to 4,096 chips
command    `unclip plan`
"""
