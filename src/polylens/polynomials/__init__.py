"""The polynomials themselves: kept, evaluated, ended, explained."""
