package cryptohook

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"
)

// JSON of which there is one reading only: what others sign, and check again elsewhere, must mean the same to everybody.
// https://spec.matrix.org/v1.16/appendices/#canonical-json

const (
	// maxDepth is how deep objects and lists may be within each other.
	maxDepth = 32
	// maxInteger is the largest number that everybody reads alike.
	maxInteger = 1<<53 - 1
)

// jsonFault says where JSON is not as it has to be.
type jsonFault struct{ path, fault string }

func (f *jsonFault) Error() string { return f.path + ": " + f.fault }

// parseStrict reads JSON into maps, lists, texts, json.Numbers and truth values. It refuses what is read in different ways: names that are
// there twice, numbers that are no integers, what is not UTF-8. The error is a jsonFault.
func parseStrict(text []byte) (any, error) {
	if !utf8.Valid(text) {
		return nil, &jsonFault{"", "is not valid UTF-8"}
	}
	decoder := json.NewDecoder(bytes.NewReader(text))
	decoder.UseNumber()
	value, err := readStrict(decoder, "", 0)
	if err != nil {
		return nil, err
	}
	if _, err = decoder.Token(); !errors.Is(err, io.EOF) {
		return nil, &jsonFault{"", "goes on after its end"}
	}
	return value, nil
}

func readStrict(decoder *json.Decoder, path string, depth int) (any, error) {
	token, err := decoder.Token()
	if err != nil {
		return nil, &jsonFault{path, "is not valid JSON"}
	}
	if depth > maxDepth {
		return nil, &jsonFault{path, fmt.Sprintf("is more than %d levels deep", maxDepth)}
	}
	switch value := token.(type) {
	case json.Delim:
		if value == '[' {
			return readStrictList(decoder, path, depth)
		}
		return readStrictObject(decoder, path, depth)
	case json.Number:
		return value, checkInteger(path, value)
	case string:
		return value, checkText(path, value)
	default:
		return value, nil
	}
}

func readStrictObject(decoder *json.Decoder, path string, depth int) (any, error) {
	object := make(map[string]any)
	for decoder.More() {
		token, err := decoder.Token()
		if err != nil {
			return nil, &jsonFault{path, "is not valid JSON"}
		}
		name, _ := token.(string)
		at := below(path, name)
		if err = checkText(at, name); err != nil {
			return nil, err
		}
		if _, twice := object[name]; twice {
			return nil, &jsonFault{at, "is there twice"}
		}
		if object[name], err = readStrict(decoder, at, depth+1); err != nil {
			return nil, err
		}
	}
	if _, err := decoder.Token(); err != nil {
		return nil, &jsonFault{path, "is not valid JSON"}
	}
	return object, nil
}

func readStrictList(decoder *json.Decoder, path string, depth int) (any, error) {
	list := make([]any, 0)
	for decoder.More() {
		value, err := readStrict(decoder, fmt.Sprintf("%s[%d]", path, len(list)), depth+1)
		if err != nil {
			return nil, err
		}
		list = append(list, value)
	}
	if _, err := decoder.Token(); err != nil {
		return nil, &jsonFault{path, "is not valid JSON"}
	}
	return list, nil
}

func checkInteger(path string, number json.Number) error {
	value, err := number.Int64()
	if err != nil || value > maxInteger || value < -maxInteger || strconv.FormatInt(value, 10) != number.String() {
		return &jsonFault{path, "is not an integer as Matrix writes them"}
	}
	return nil
}

// checkText refuses half characters. They come out of the decoder as the replacement character.
func checkText(path, text string) error {
	if strings.ContainsRune(text, utf8.RuneError) {
		return &jsonFault{path, "holds a character that is not valid"}
	}
	return nil
}

var plainName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// below gives the path of an object's member: a.b, or a["b c"].
func below(path, name string) string {
	switch {
	case !plainName.MatchString(name):
		return path + "[" + strconv.Quote(name) + "]"
	case path == "":
		return name
	default:
		return path + "." + name
	}
}

// canonicalJSON writes what parseStrict has read, and Go's own integers, as canonical JSON.
func canonicalJSON(value any) []byte {
	var out bytes.Buffer
	writeCanonical(&out, value)
	return out.Bytes()
}

func writeCanonical(out *bytes.Buffer, value any) {
	switch v := value.(type) {
	case map[string]any:
		separator := byte('{')
		for _, name := range slices.Sorted(maps.Keys(v)) {
			out.WriteByte(separator)
			separator = ','
			writeCanonicalText(out, name)
			out.WriteByte(':')
			writeCanonical(out, v[name])
		}
		if len(v) == 0 {
			out.WriteByte('{')
		}
		out.WriteByte('}')
	case []any:
		out.WriteByte('[')
		for i, item := range v {
			if i > 0 {
				out.WriteByte(',')
			}
			writeCanonical(out, item)
		}
		out.WriteByte(']')
	case string:
		writeCanonicalText(out, v)
	default:
		fmt.Fprint(out, orNull(v))
	}
}

func orNull(value any) any {
	if value == nil {
		return "null"
	}
	return value
}

var shortEscapes = map[rune]string{'"': `\"`, '\\': `\\`, '\b': `\b`, '\f': `\f`, '\n': `\n`, '\r': `\r`, '\t': `\t`}

func writeCanonicalText(out *bytes.Buffer, text string) {
	out.WriteByte('"')
	for _, r := range text {
		escape, short := shortEscapes[r]
		switch {
		case short:
			out.WriteString(escape)
		case r < ' ':
			fmt.Fprintf(out, `\u%04x`, r)
		default:
			out.WriteRune(r)
		}
	}
	out.WriteByte('"')
}

// withoutFields gives an object without some of its members.
func withoutFields(object map[string]any, names ...string) map[string]any {
	left := maps.Clone(object)
	for _, name := range names {
		delete(left, name)
	}
	return left
}
