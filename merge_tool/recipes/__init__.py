"""Recipes of any number of models, in mergekit's YAML: text -> `ModelsRecipe` -> what becomes of every tensor."""
