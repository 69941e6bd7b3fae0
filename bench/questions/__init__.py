"""One module per question. `runner` finds them by name.

A module's docstring is its help text (the first line alone in lists), and
``def measure(options: Options) -> Report`` answers the question.
"""
