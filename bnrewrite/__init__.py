"""bnrewrite: reads normalisations out of a model's graph by algebra and gives them native speed."""
