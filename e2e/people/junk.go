package people

import (
	"fmt"
	"maps"
	"slices"
	"strings"
)

// Junk is a content in which one field was spoiled.
type Junk struct {
	// Name says which field, and how: "ciphertext: a number".
	Name    string
	Content map[string]any
}

// spoilt are the values that are put into every field. Each is legal JSON: a homeserver passes it on.
var spoilt = []struct {
	name  string
	value any
}{
	{"null", nil},
	{"a number", 7},
	{"a boolean", true},
	{"an array", []any{"x", 1, nil}},
	{"an object", map[string]any{"x": map[string]any{"y": []any{}}}},
	{"an empty string", ""},
	{"not base64", "~~~ not base64 ~~~"},
	{"base64 of nothing useful", "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"},
	{"control characters", "\x00\x01\u202e\ufffd"},
	{"huge", strings.Repeat("A", 40_000)},
}

// JunkIn gives, for every field of a valid content at every depth, the content without that field and the content with that
// field spoilt in every way.
func JunkIn(valid map[string]any) ([]Junk, error) {
	var junk []Junk
	for _, path := range pathsIn(valid) {
		name := strings.Join(path, ".")
		missing, err := clone(valid)
		if err != nil {
			return nil, err
		}
		if err = Remove(path...)(nil, missing); err != nil {
			return nil, err
		}
		junk = append(junk, Junk{name + ": missing", missing})
		for _, bad := range spoilt {
			content, err := clone(valid)
			if err != nil {
				return nil, err
			}
			if err = Set(bad.value, path...)(nil, content); err != nil {
				return nil, err
			}
			junk = append(junk, Junk{fmt.Sprintf("%s: %s", name, bad.name), content})
		}
	}
	return junk, nil
}

// pathsIn lists the fields of an object and of the objects in it, in order.
func pathsIn(object map[string]any) (paths [][]string) {
	for _, key := range slices.Sorted(maps.Keys(object)) {
		paths = append(paths, []string{key})
		if inner, ok := object[key].(map[string]any); ok {
			for _, path := range pathsIn(inner) {
				paths = append(paths, append([]string{key}, path...))
			}
		}
	}
	return paths
}
