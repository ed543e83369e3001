"""How weights are stored and checked: casts by recipe, and the digest of stored codes.

Nothing here moves bytes: the kernels that do are in `weightsync._native` (`pack`, `fill`,
`digest`, ...). This package names what they do, builds the tables they take, and holds slow
references that are right by inspection.
"""
