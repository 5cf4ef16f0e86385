"""Give back what compression lost: training under a frozen mask and a frozen grid."""
