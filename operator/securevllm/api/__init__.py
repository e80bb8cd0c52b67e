"""The resource ``SecureVLLMDeployment``: its models, its schema, and the parser that judges a spec."""
