from merge_tool.cli import merge_tool

if __name__ == "__main__":
    merge_tool(prog_name="merge-tool")
