"""The engines that come with modelyard, one module or package each; README.md says how to add another."""
