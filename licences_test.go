package main

import (
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// The licences under which a library may be part of this program, which is itself under MPL-2.0: none of them asks for more than to be
// named.
var fitting = []string{"MIT", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Apache-2.0", "MPL-2.0"}

// What is linked is what docs/licences.md lists, in the same version. If this fails: make licences.
func TestLicencesOfEverythingLinkedAreListed(t *testing.T) {
	text, err := os.ReadFile("docs/licences.md")
	if err != nil {
		t.Fatal(err)
	}
	listed := map[string]bool{} // library and version, until they are found to be linked
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.Trim(line, "| \n"), " | ")
		if len(cells) != 3 || cells[0] == "library" {
			continue
		}
		listed[cells[0]+" "+cells[1]] = true
		if !slices.Contains(fitting, cells[2]) {
			t.Errorf("%s is under %q, which nobody has said that it fits", cells[0], cells[2])
		}
	}
	const perModule = `{{with .Module}}{{if not .Main}}{{.Path}} {{.Version}}{{end}}{{end}}`
	output, err := exec.CommandContext(t.Context(), "go", "list", "-deps", "-tags", "goolm", "-f", perModule, ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	linked := strings.Fields(strings.ReplaceAll(string(output), " ", "@"))
	slices.Sort(linked)
	for _, module := range slices.Compact(linked) {
		path, version, _ := strings.Cut(module, "@")
		found := false
		for row := range listed {
			library, listedVersion, _ := strings.Cut(row, " ")
			if listedVersion == version && (library == path || strings.HasPrefix(library, path+"/")) {
				found = true
				delete(listed, row)
			}
		}
		if !found {
			t.Errorf("%s is linked, and not listed", module)
		}
	}
	for row := range listed {
		t.Errorf("%s is listed, and not linked", row)
	}
}
