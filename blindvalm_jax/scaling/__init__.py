"""What runs of many sizes tell: fitted laws, best sizes for a budget, families at equal budget."""
