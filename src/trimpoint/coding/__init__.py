"""Compressed storage: files in one coded file, and back bit for bit.

The weights of a network are most of its file and no text: general compressors find little in them. Here they are taken
out of the file that holds them, coded as what they are (zeros, clustered values, integers on a grid, floats), and put
back where they were. Nothing here imports torch, and reading needs NumPy alone.
"""

from trimpoint.coding.container import Contents as Contents
from trimpoint.coding.model import code_model as code_model
from trimpoint.coding.model import coded_model as coded_model
from trimpoint.coding.reading import is_coded as is_coded
from trimpoint.coding.reading import read_about as read_about
from trimpoint.coding.reading import read_coded as read_coded
from trimpoint.coding.writing import write_coded as write_coded
