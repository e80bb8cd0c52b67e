# Prints the targets of a Makefile: `target: ... ## what it does`, under headings `##@ heading`.
BEGIN {
  "test -t 1 && printf 1" | getline terminal
  bold = terminal && !ENVIRON["NO_COLOR"] ? "\033[1m" : ""
  plain = bold ? "\033[0m" : ""
  print "Secure vLLM Operator"
}
/^##@ / { printf "\n%s%s%s\n", bold, substr($0, 5), plain }
/^[a-z0-9-]+:.* ## / {
  target = $0
  sub(/:.*/, "", target)
  sub(/^.* ## /, "")
  printf "  %smake %-8s%s %s\n", bold, target, plain, $0
}
