"""An OpenAI-compatible HTTP server around `wavejax.engine.batching`: the extra `wavejax[serve]`.

`app.create_app` makes the application, `running.serve` listens; `python -m wavejax.serve` does
both. No prompt text is logged.
"""
