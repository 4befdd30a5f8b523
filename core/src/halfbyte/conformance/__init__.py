"""The public conformance kit: `pytest -p halfbyte.conformance --pyargs halfbyte.conformance --kernel ID`.

`data`, `oracle` and `tolerances` need torch alone; everything else needs the extra `conformance`.
"""

#: pytest loads the kit's options and fixtures from there, so that importing this package imports no pytest.
pytest_plugins = ("halfbyte.conformance.plugin",)
