"""Matrix products of consecutive groups of rows, each with its own matrix: the experts of a mixture."""
