"""The papers' learning experiments, to be run from the command line: `racecar run RECIPE`."""

from .registry import RECIPES, Recipe

__all__ = ["RECIPES", "Recipe"]
