"""Policy at issue: an operator's rules in Cedar, which can only narrow what this product's own rules already grant.

``asked`` says what a question is, ``decision`` what an answer is, ``bundle`` which rules are accepted at all (``lints``: what a valid
one is refused for), ``facts`` writes a question down for the engine, ``cedar`` is the one module that knows the engine, ``rules`` asks
the bundle in force, ``bundles`` changes it, ``rejudge`` ends what a new one denies. Nothing that must never be switched off is here:
state, subset, binding and lives are the product's own code.
"""
