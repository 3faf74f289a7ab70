"""vLLM's hooks, in folders by the process that runs them; what goes between these is in ``messages``.

``front`` amends the command line, the engine's configuration and what a request may ask for; ``scheduler`` grants and
frees blocks and touches no tensor; ``worker`` scores, moves and redirects, and frees no block.
"""
