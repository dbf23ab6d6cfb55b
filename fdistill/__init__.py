"""fdistill"""
