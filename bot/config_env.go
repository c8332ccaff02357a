package bot

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/rs/zerolog"
	"gopkg.in/yaml.v3"
)

const environPrefix = "SENDERTRUST_"

// configReader turns the text of a config file and the environment into a Config, and collects every fault on the way.
type configReader struct {
	config     *Config
	faults     []string
	source     string            // what the faults of a value that is being read begin with: the file's path, or the variable
	inFile     bool              // whether the lines of nodes are those of the file
	path       string            // of the file
	variables  map[string]string // key → the variable that it came from, if not from the file
	unreadable map[string]bool   // keys with a fault in their form: what they say is not checked
}

// readConfig reads and checks everything that does not depend on the machine, except the files that _FILE variables name.
func readConfig(path string, text []byte, environ []string) *configReader {
	r := &configReader{
		config:     defaultConfig(),
		source:     path,
		inFile:     true,
		path:       path,
		variables:  map[string]string{},
		unreadable: map[string]bool{},
	}
	root, err := parseYAML(text)
	if err != nil {
		r.faults = append(r.faults, fmt.Sprintf("%s: %v", path, err))
		return r
	}
	r.read(root, reflect.ValueOf(r.config).Elem(), "")
	if root.Kind != yaml.MappingNode {
		return r
	}
	r.inFile = false
	r.readEnvironment(environ)
	r.validate()
	return r
}

// fault notes what is wrong with the value of a key that could be read.
func (r *configReader) fault(key, format string, args ...any) {
	if r.misunderstood(key) {
		return
	}
	source := r.path
	if variable, ok := r.variables[key]; ok {
		source = variable
	}
	r.faults = append(r.faults, source+": "+key+": "+fmt.Sprintf(format, args...))
}

// misunderstood reports whether a key, or its whole section, has a fault in its form already.
func (r *configReader) misunderstood(key string) bool {
	section, _, _ := strings.Cut(key, ".")
	return r.unreadable[key] || (r.unreadable[section] && !r.fromEnvironment(key))
}

// misread notes what is wrong with the form of a value.
func (r *configReader) misread(node *yaml.Node, key, format string, args ...any) {
	r.unreadable[key] = true
	fault := r.source + ": "
	if r.inFile {
		fault += fmt.Sprintf("line %d: ", node.Line)
	}
	if key != "" {
		fault += key + ": "
	}
	r.faults = append(r.faults, fault+fmt.Sprintf(format, args...))
}

func (r *configReader) fromEnvironment(key string) bool {
	_, ok := r.variables[key]
	return ok
}

// read decodes a node into a value as yaml.v3 would, but its faults name the key and never show a secret, and nothing is
// dropped in silence: unknown and repeated keys are faults, and so are the YAML features that swallow unquoted values.
func (r *configReader) read(node *yaml.Node, into reflect.Value, key string) {
	if node.Kind == yaml.AliasNode || node.Anchor != "" || node.Style&yaml.TaggedStyle != 0 {
		r.misread(node, key, "begins with *, & or !, which has a meaning of its own in YAML; put the value in quotes")
		return
	}
	switch value := into.Addr().Interface().(type) {
	case *time.Duration:
		r.readDuration(node, value, key)
		return
	case *zerolog.Level:
		r.readLevel(node, value, key)
		return
	}
	switch into.Kind() {
	case reflect.Struct:
		r.readStruct(node, into, key)
	case reflect.Map:
		r.readMap(node, into, key)
	case reflect.Slice:
		r.readList(node, into, key)
	case reflect.Pointer:
		if node.Tag == "!!null" {
			return
		}
		into.Set(reflect.New(into.Type().Elem()))
		r.read(node, into.Elem(), key)
	case reflect.Bool:
		if parsed, err := strconv.ParseBool(node.Value); r.isText(node, key, "true or false") {
			into.SetBool(parsed)
			if err != nil || len(node.Value) == 1 {
				r.misread(node, key, "%s is neither true nor false; write one of the two", quoteValue(node.Value))
			}
		}
	case reflect.Int:
		if parsed, err := strconv.Atoi(node.Value); r.isText(node, key, "a number") {
			into.SetInt(int64(parsed))
			if err != nil {
				r.misread(node, key, "%s is not a whole number; write for example 100", quoteValue(node.Value))
			}
		}
	case reflect.String:
		if r.isText(node, key, "text") {
			into.SetString(node.Value)
			if node.Tag == "!!null" {
				into.SetString("")
			}
		}
	default: // any
		if err := node.Decode(into.Addr().Interface()); err != nil {
			r.misread(node, key, "is not a value that YAML knows")
		}
	}
}

// isText reports whether a node is a single value, and notes a fault if it is not.
func (r *configReader) isText(node *yaml.Node, key, right string) bool {
	if node.Kind != yaml.ScalarNode {
		r.misread(node, key, "is %s; write %s", kindName(node), right)
		return false
	}
	return true
}

func (r *configReader) readDuration(node *yaml.Node, into *time.Duration, key string) {
	if !r.isText(node, key, "a time, for example 25s") {
		return
	}
	parsed, err := time.ParseDuration(node.Value)
	if err != nil {
		r.misread(node, key, "%s is not a time; write a number with its unit, for example 25s or 2m", quoteValue(node.Value))
	}
	*into = parsed
}

func (r *configReader) readLevel(node *yaml.Node, into *zerolog.Level, key string) {
	if !r.isText(node, key, "a level, for example info") {
		return
	}
	parsed, err := zerolog.ParseLevel(node.Value)
	if err != nil || parsed == zerolog.NoLevel {
		r.misread(node, key, "%s is not a level; write error, warn, info, debug or trace", quoteValue(node.Value))
	}
	*into = parsed
}

func (r *configReader) readStruct(node *yaml.Node, into reflect.Value, key string) {
	fields := yamlFields(into.Type())
	r.eachEntry(node, key, func(name, value *yaml.Node) {
		if field, ok := fields[name.Value]; ok {
			r.read(value, into.FieldByIndex(field.Index), joinKey(key, name.Value))
			return
		}
		known := slices.Collect(maps.Keys(configKeys(reflect.TypeFor[Config](), "", true)))
		for field := range fields {
			known = append(known, joinKey(key, field))
		}
		near := nearestKey(joinKey(key, name.Value), known)
		r.unreadable[near] = true // said once is enough, if it is required
		if !isShowable(name, value) {
			r.misread(name, key, "has a key that is not known here; the nearest one is %s", near)
			return
		}
		r.misread(name, joinKey(key, name.Value), "is not a known key; did you mean %s?", near)
	})
}

var keyShape = regexp.MustCompile(`^[A-Za-z][A-Za-z0-9_.-]{0,39}$`)

// isShowable tells a key from what may be a part of a secret that was not put in quotes: {password: one,two}.
func isShowable(name, value *yaml.Node) bool {
	return value.Tag != "!!null" && keyShape.MatchString(name.Value)
}

func (r *configReader) readMap(node *yaml.Node, into reflect.Value, key string) {
	into.Set(reflect.MakeMap(into.Type()))
	r.eachEntry(node, key, func(name, value *yaml.Node) {
		entry := reflect.New(into.Type().Elem()).Elem()
		r.read(value, entry, key)
		into.SetMapIndex(reflect.ValueOf(name.Value).Convert(into.Type().Key()), entry)
	})
}

// eachEntry calls do for every entry of a mapping. A section without a value is one without entries.
func (r *configReader) eachEntry(node *yaml.Node, key string, do func(name, value *yaml.Node)) {
	if node.Tag == "!!null" {
		return
	}
	if node.Kind != yaml.MappingNode {
		r.misread(node, key, `is %s; write lines of the form "key: value"`, kindName(node))
		return
	}
	lines := map[string]int{}
	for i := 0; i+1 < len(node.Content); i += 2 {
		name, value := node.Content[i], node.Content[i+1]
		if name.Kind != yaml.ScalarNode || name.Anchor != "" || name.Style&yaml.TaggedStyle != 0 {
			r.misread(name, key, `has a key that is not a plain word; write lines of the form "key: value"`)
		} else if first, ok := lines[name.Value]; ok && isShowable(name, value) {
			r.misread(name, joinKey(key, name.Value), "is there twice, first on line %d; remove one of the two", first)
		} else if ok {
			r.misread(name, key, "has an entry twice, first on line %d; remove one of the two", first)
		} else {
			lines[name.Value] = name.Line
			do(name, value)
		}
	}
}

func (r *configReader) readList(node *yaml.Node, into reflect.Value, key string) {
	into.SetZero()
	if node.Tag == "!!null" {
		return
	}
	if node.Kind != yaml.SequenceNode {
		r.misread(node, key, "is %s; write a list, for example [a, b]", kindName(node))
		return
	}
	list := reflect.MakeSlice(into.Type(), len(node.Content), len(node.Content))
	for i, item := range node.Content {
		r.read(item, list.Index(i), key)
	}
	into.Set(list)
}

func kindName(node *yaml.Node) string {
	switch node.Kind {
	case yaml.MappingNode:
		return "a section with keys of its own"
	case yaml.SequenceNode:
		return "a list"
	default:
		return "a single value"
	}
}

func joinKey(section, name string) string {
	if section == "" {
		return name
	}
	return section + "." + name
}

// yamlFields returns the fields of a struct by their YAML names.
func yamlFields(of reflect.Type) map[string]reflect.StructField {
	fields := map[string]reflect.StructField{}
	for _, field := range reflect.VisibleFields(of) {
		if name, _, _ := strings.Cut(field.Tag.Get("yaml"), ","); name != "" && field.IsExported() {
			fields[name] = field
		}
	}
	return fields
}

// configKeys returns all keys of a struct with their types: of the lowest level only, or of the sections too.
func configKeys(of reflect.Type, prefix string, sections bool) map[string]reflect.Type {
	keys := map[string]reflect.Type{}
	for name, field := range yamlFields(of) {
		key := joinKey(prefix, name)
		if field.Type.Kind() == reflect.Struct {
			maps.Copy(keys, configKeys(field.Type, key, sections))
		}
		if sections || field.Type.Kind() != reflect.Struct {
			keys[key] = field.Type
		}
	}
	return keys
}

// nearestKey returns the known key that is most like an unknown one.
func nearestKey(unknown string, known []string) string {
	slices.Sort(known)
	return slices.MinFunc(known, func(a, b string) int { return keyDistance(unknown, a) - keyDistance(unknown, b) })
}

// keyDistance tells how unlike two keys are. A right name in the wrong section is nearly right.
func keyDistance(a, b string) int {
	lastA, lastB := a[strings.LastIndexByte(a, '.')+1:], b[strings.LastIndexByte(b, '.')+1:]
	return min(editDistance(a, b), editDistance(lastA, lastB)+1)
}

// editDistance returns how many bytes must be inserted, removed or replaced to make a into b (Levenshtein). What is too long
// to be a key is cut off.
func editDistance(a, b string) int {
	a = a[:min(len(a), 80)]
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			replaced := diagonal
			if a[i] != b[j] {
				replaced++
			}
			diagonal = row[j+1]
			row[j+1] = min(replaced, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

// quoteValue makes a value fit for a line of text.
func quoteValue(value string) string {
	const most = 80
	if characters := []rune(value); len(characters) > most {
		value = string(characters[:most]) + "…"
	}
	return strconv.Quote(value)
}

// readEnvironment reads the variables SENDERTRUST_SECTION__KEY, and those with _FILE at the end.
func (r *configReader) readEnvironment(environ []string) {
	known := slices.Collect(maps.Keys(configKeys(reflect.TypeFor[Config](), "", false)))
	keys := map[string]string{} // variable → key
	for _, key := range known {
		keys[variableName(key)] = key
	}
	for _, assignment := range slices.Sorted(slices.Values(environ)) {
		variable, value, _ := strings.Cut(assignment, "=")
		if !strings.HasPrefix(variable, environPrefix) {
			continue
		}
		name, isFile := strings.CutSuffix(variable, "_FILE")
		key, ok := keys[name]
		if !ok {
			near := nearestKey(strings.ReplaceAll(strings.ToLower(strings.TrimPrefix(name, environPrefix)), "__", "."), known)
			r.faults = append(r.faults, fmt.Sprintf("%s: is not a known variable; did you mean %s?", strings.Trim(quoteValue(variable), `"`), variableName(near)))
			continue
		}
		r.readVariable(variable, key, value, isFile)
	}
}

func variableName(key string) string {
	return environPrefix + strings.ToUpper(strings.ReplaceAll(key, ".", "__"))
}

func (r *configReader) readVariable(variable, key, value string, isFile bool) {
	r.source = variable
	if other, ok := r.variables[key]; ok {
		r.misread(nil, key, "is set by %s too; keep one of the two", other)
		return
	}
	r.variables[key] = variable
	delete(r.unreadable, key) // what the file said does not matter
	if isFile {
		content, err := readSmallFile(value)
		if err != nil {
			r.misread(nil, key, "the file cannot be read: %v; name a file that the bot's user may read", withoutPath(err))
			return
		}
		value = strings.TrimRight(string(content), "\r\n")
	}
	target := reflect.ValueOf(r.config).Elem()
	for name := range strings.SplitSeq(key, ".") {
		target = target.FieldByIndex(yamlFields(target.Type())[name].Index)
	}
	node, err := variableNode(value, target.Kind())
	if err != nil {
		r.misread(nil, key, "%v", err)
		return
	}
	r.read(node, target, key)
	if (key == pickleKey || key == recoveryKey) && value == Generate {
		r.misread(nil, key, `"generate" works in the config file only, where the key can be kept; give the key itself`)
	}
}

// variableNode returns the value of a variable as YAML: lists may also be separated by commas, single values are text.
func variableNode(value string, kind reflect.Kind) (*yaml.Node, error) {
	trimmed := strings.TrimSpace(value)
	isList := kind == reflect.Slice
	switch {
	case isList && !strings.HasPrefix(trimmed, "[") && !strings.HasPrefix(trimmed, "- "):
		list := &yaml.Node{Kind: yaml.SequenceNode}
		for item := range strings.SplitSeq(trimmed, ",") {
			if item = strings.TrimSpace(item); item != "" {
				list.Content = append(list.Content, textNode(item))
			}
		}
		return list, nil
	case (isList || kind == reflect.Map) && trimmed != "":
		return parseYAML([]byte(value))
	case kind == reflect.Map:
		return &yaml.Node{Kind: yaml.MappingNode}, nil
	}
	return textNode(value), nil
}

func textNode(value string) *yaml.Node {
	return &yaml.Node{Kind: yaml.ScalarNode, Tag: "!!str", Value: value}
}

// parseYAML returns the root of the only document in text. Its errors say what to do, and show nothing of the text.
func parseYAML(text []byte) (*yaml.Node, error) {
	decoder := yaml.NewDecoder(bytes.NewReader(text))
	var document, more yaml.Node
	err := decoder.Decode(&document)
	if errors.Is(err, io.EOF) || (err == nil && (len(document.Content) == 0 || document.Content[0].Tag == "!!null")) {
		return nil, errors.New("is empty; fill it with the example, which sendertrust -e writes")
	} else if err != nil {
		return nil, explainYAML(err)
	}
	if err = decoder.Decode(&more); err == nil {
		return nil, errors.New("has two YAML documents; remove the line --- between them, or one of the two")
	} else if !errors.Is(err, io.EOF) {
		return nil, explainYAML(err)
	}
	return document.Content[0], nil
}

// mustParseYAML parses what parseYAML has accepted before.
func mustParseYAML(text []byte) *yaml.Node {
	root, err := parseYAML(text)
	if err != nil {
		panic(fmt.Errorf("failed to parse valid YAML again: %w", err))
	}
	return root
}

func explainYAML(err error) error {
	cause := strings.TrimPrefix(err.Error(), "yaml: ")
	switch {
	case strings.Contains(cause, "anchor"): // names the value, which may be a password
		return errors.New("is not YAML: a value begins with * or &; put it in quotes")
	case strings.Contains(cause, "cannot start any token"):
		cause += `; put values that begin with @, % or a backquote in quotes, and indent with spaces`
	default:
		cause += "; check the quotes, the colons and the spaces before the keys in and above that line"
	}
	return fmt.Errorf("is not YAML: %s", cause)
}
