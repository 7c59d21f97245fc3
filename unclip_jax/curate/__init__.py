"""What is left out of a data set and why: the pre-training mitigations of DALL-E 2, on stored CLIP embeddings.

manifest    what a step removed, row by row; its parts, and several steps together as a skip list and weights
features    what a probe reads of a record
probe       a small classifier on embeddings
calibration scores as probabilities
filters     a probe learned from labels cuts a source, and says what to label next
clusters    mini-batch k-means
duplicates  pairs found inside the clusters of several clusterings; one picture of every group stays
pixels      whether two small pictures show the same
reweight    density ratios of all against kept
score       cuts by CLIP score or an aesthetic head

Everything works in blocks of mapped files; nothing is of the order of rows times rows.
"""
