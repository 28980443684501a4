"""Calls with the signatures of other frameworks' layers; each file stands alone and imports no framework but its own.

They are a part of the package, not examples, because a model calls them in each step: what they promise is tested with
the package. docs/guides/adapters.md has a recipe for each.
"""
