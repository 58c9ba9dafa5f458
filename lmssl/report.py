def model_card(m, r): return "# model\n"
def label_table(m): return str(m.get("summary"))
