"""What an adapter tells of the rows it was trained on, as pure functions of losses and tokens; nothing here loads a
model. `site/audit` measures.
"""
