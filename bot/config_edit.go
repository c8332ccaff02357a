package bot

import (
	"bytes"
	"encoding/json"
	"reflect"
	"slices"
	"strings"
	"unicode/utf8"

	"gopkg.in/yaml.v3"
)

// The text of the file is edited in place, so that all that the user wrote stays as it is: the YAML nodes only tell where.
// An edit is accepted if the new text means what the old one meant, with the intended change and no other.

// addMissingKeys returns text with the keys of the example that it lacks, except those to skip. What has no default must
// be in the text or be skipped: the example shows only an example of it. Sections in flow style ({…}) stay as they are, unless the program must write a secret there.
func addMissingKeys(text []byte, example string, skip func(key string) bool) []byte {
	for _, section := range splitExample(example) {
		root := mustParseYAML(text)
		header, body := mappingEntry(root, section.name)
		var lines strings.Builder
		added := map[string]any{}
		for _, key := range section.keys {
			path := section.name + "." + key.name
			if present, _ := mappingEntry(body, key.name); present != nil || skip(path) {
				continue
			}
			lines.WriteString(key.text)
			added[path] = key.value
		}
		var edited []byte
		switch {
		case len(added) == 0:
			continue
		case header == nil && root.Style&yaml.FlowStyle == 0:
			edited = appendLines(text, "\n"+section.header+indented(lines.String(), "    "))
		case header != nil && body.Style&yaml.FlowStyle == 0:
			edited = insertLines(text, header.Line, indented(lines.String(), indentation(body)))
		case added[pickleKey] != nil:
			added = map[string]any{pickleKey: Generate}
			edited = insertFlow(text, root, body, "encryption", "pickle_key: "+Generate)
		}
		if changedOnly(text, edited, added) {
			text = edited
		}
	}
	return text
}

// replaceGenerate returns text with the secret in place of the word Generate at key, or nil if the word is not there.
func replaceGenerate(text []byte, key string, secret Secret) []byte {
	root, err := parseYAML(text)
	if err != nil {
		return nil
	}
	section, name, _ := strings.Cut(key, ".")
	_, body := mappingEntry(root, section)
	_, value := mappingEntry(body, name)
	if value == nil {
		return nil
	}
	quoted, err := json.Marshal(secret.Reveal()) // a JSON string is a YAML string too
	if err != nil {
		return nil
	}
	at := byteOffset(text, value.Line, value.Column)
	for _, written := range []string{Generate, `"` + Generate + `"`, `'` + Generate + `'`} {
		if bytes.HasPrefix(text[at:], []byte(written)) {
			edited := slices.Concat(text[:at], quoted, text[at+len(written):])
			if changedOnly(text, edited, map[string]any{key: secret.Reveal()}) {
				return edited
			}
		}
	}
	return nil
}

// changedOnly reports whether edited means the same as text, except that the keys of change have these values.
func changedOnly(text, edited []byte, change map[string]any) bool {
	root, err := parseYAML(edited)
	if err != nil {
		return false
	}
	var before, after map[string]any
	if mustParseYAML(text).Decode(&before) != nil || root.Decode(&after) != nil {
		return false
	}
	for key, value := range change {
		section, name, _ := strings.Cut(key, ".")
		if before[section] == nil {
			before[section] = map[string]any{}
		}
		if body, ok := before[section].(map[string]any); ok {
			body[name] = value
		}
	}
	return reflect.DeepEqual(before, after)
}

// exampleSection is a part of config.example.yaml.
type exampleSection struct {
	name   string
	header string // its comment, and the line with its name
	keys   []exampleKey
}

type exampleKey struct {
	name  string
	text  string // its comment and its value, not indented
	value any
}

func splitExample(example string) []exampleSection {
	if example == "" {
		return nil
	}
	lines := strings.SplitAfter(example, "\n")
	root := mustParseYAML([]byte(example))
	var sections []exampleSection
	for i := 0; i < len(root.Content); i += 2 {
		header, body := root.Content[i], root.Content[i+1]
		end := len(lines)
		if i+2 < len(root.Content) {
			end = commentStart(lines, root.Content[i+2].Line)
		}
		section := exampleSection{name: header.Value, header: strings.Join(lines[commentStart(lines, header.Line):header.Line], "")}
		for j := 0; j < len(body.Content); j += 2 {
			keyEnd := end
			if j+2 < len(body.Content) {
				keyEnd = commentStart(lines, body.Content[j+2].Line)
			}
			key := exampleKey{name: body.Content[j].Value}
			for _, line := range lines[commentStart(lines, body.Content[j].Line):keyEnd] {
				if strings.TrimSpace(line) != "" {
					key.text += strings.TrimPrefix(line, "    ")
				}
			}
			_ = body.Content[j+1].Decode(&key.value) // any value decodes into any
			section.keys = append(section.keys, key)
		}
		sections = append(sections, section)
	}
	return sections
}

// commentStart returns the index of the first line of the comment directly above a line, which is counted from 1.
func commentStart(lines []string, line int) int {
	start := line - 1
	for start > 0 && strings.HasPrefix(strings.TrimSpace(lines[start-1]), "#") {
		start--
	}
	return start
}

func indented(lines, indent string) string {
	return indent + strings.TrimSuffix(strings.ReplaceAll(lines, "\n", "\n"+indent), indent)
}

// indentation returns how the keys of a section are indented.
func indentation(body *yaml.Node) string {
	if len(body.Content) == 0 {
		return "    "
	}
	return strings.Repeat(" ", body.Content[0].Column-1)
}

func appendLines(text []byte, lines string) []byte {
	return insertLines(text, bytes.Count(text, []byte("\n"))+1, lines)
}

// insertLines returns text with lines after the given one, which is counted from 1, with the line endings of the text.
func insertLines(text []byte, after int, lines string) []byte {
	at := byteOffset(text, after+1, 1)
	if at == len(text) && !bytes.HasSuffix(text, []byte("\n")) {
		lines = "\n" + lines
	}
	if bytes.Contains(text, []byte("\r\n")) {
		lines = strings.ReplaceAll(lines, "\n", "\r\n")
	}
	return slices.Concat(text[:at], []byte(lines), text[at:])
}

// insertFlow returns text with an entry at the beginning of a section in flow style, which it makes if body is nil.
func insertFlow(text []byte, root, body *yaml.Node, section, entry string) []byte {
	into := body
	if body == nil {
		into = root
		entry = section + ": {" + entry + "}"
	}
	if len(into.Content) > 0 {
		entry += ", "
	}
	at := byteOffset(text, into.Line, into.Column) + len("{")
	if at > len(text) {
		return nil
	}
	return slices.Concat(text[:at], []byte(entry), text[at:])
}

// byteOffset returns where a line and column are, both counted from 1, the column in characters; or the end of the text.
func byteOffset(text []byte, line, column int) int {
	at := 0
	for ; line > 1; line-- {
		next := bytes.IndexByte(text[at:], '\n')
		if next < 0 {
			return len(text)
		}
		at += next + 1
	}
	for ; column > 1 && at < len(text); column-- {
		_, size := utf8.DecodeRune(text[at:])
		at += size
	}
	return at
}

// mappingEntry returns the key and the value of an entry, or nil and nil if there is none.
func mappingEntry(mapping *yaml.Node, name string) (key, value *yaml.Node) {
	if mapping == nil || mapping.Kind != yaml.MappingNode {
		return nil, nil
	}
	for i := 0; i+1 < len(mapping.Content); i += 2 {
		if mapping.Content[i].Value == name {
			return mapping.Content[i], mapping.Content[i+1]
		}
	}
	return nil, nil
}
