EMBEDDED = "embedded"
def ensure(): raise NotImplementedError
