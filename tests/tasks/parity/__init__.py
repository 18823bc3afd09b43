"""A whole task in one folder, as somebody would add a fourth: is the number of ones even? See
../test_fourth_task.py.
"""
