"""The command ``broker``: one module per noun, loaded when it is used. Knows no rules; each verb is a call and its answer."""
