package bot

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode/utf8"

	"gopkg.in/yaml.v3"
)

// FuzzConfigFile: the bytes of a config file, and variables of the environment, one a line. What is refused leaves nothing behind and is explained
// in lines that name the setting or the line, without a secret. What is taken is written back so that it means the same, and stays as it is from
// then on.
func FuzzConfigFile(f *testing.F) {
	example := exampleConfig(f)
	for _, text := range configSeeds(example) {
		f.Add([]byte(text), "")
	}
	for _, environ := range []string{
		"SENDERTRUST_ACCOUNT__PASSWORD=secret\nSENDERTRUST_INVITES__ALLOW=@a:b, @c:d", "SENDERTRUST_TRUST__VERIFIED_USERS={\"@a:b\": \"" + masterKey + "\"}",
		"SENDERTRUST_X=y", "SENDERTRUST_ENCRYPTION__PICKLE_KEY=generate", "SENDERTRUST_INVITES__ALLOW=[a", "SENDERTRUST_TRUST__VERIFIED_USERS=*x",
		"SENDERTRUST_ANNOTATE__MODE", "SENDERTRUST_LOGGING__WRITERS=[{type: stdout}]", "SENDERTRUST_ENCRYPTION__WAIT=1\x00", "SENDERTRUST_=\nSENDERTRUST_ACCOUNT=1",
	} {
		f.Add([]byte(completeConfig), environ)
	}
	folder := f.TempDir()
	f.Fuzz(func(t *testing.T, text []byte, environ string) {
		if strings.Contains(environ, "_FILE") || leadsAway(text, environ) {
			t.Skip("it would touch files elsewhere")
		}
		t.Chdir(emptied(t, folder))
		writeText(t, "config.yaml", string(text))
		options := LoadOptions{Example: example, Environ: strings.Split(environ, "\n")}
		c, err := Load("config.yaml", options)
		if err != nil {
			checkRefusal(t, text, environ, err)
			return
		}
		written := readText(t, "config.yaml")
		again, err := Load("config.yaml", options)
		if err != nil {
			t.Fatalf("what was taken is refused when it was written back: %v\n%s", err, written)
		}
		if toYAML(t, again) != toYAML(t, c) {
			t.Errorf("what was taken means something else when it was written back:\n%s\n%s", toYAML(t, c), toYAML(t, again))
		}
		if readText(t, "config.yaml") != written {
			t.Error("the file is written again and again")
		}
		options.ReadOnly = true
		_, err = Load("config.yaml", options)
		if err != nil && c.Account.RecoveryKey != Generate {
			t.Errorf("a complete file cannot be read without being written: %v", err)
		}
	})
}

// emptied gives the folder with nothing in it.
func emptied(t *testing.T, folder string) string {
	t.Helper()
	for _, entry := range list(t, folder) {
		if err := os.RemoveAll(filepath.Join(folder, entry)); err != nil {
			t.Fatal(err)
		}
	}
	return folder
}

func list(t *testing.T, folder string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(folder)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		names = append(names, entry.Name())
	}
	return names
}

// leadsAway says that the database would be elsewhere than in the current folder.
func leadsAway(text []byte, environ string) bool {
	if len(text) > maxConfigSize {
		return false
	}
	uri := readConfig("config.yaml", text, strings.Split(environ, "\n")).config.Database.URI.Reveal()
	file, err := sqliteFile(uri)
	return err == nil && file != ":memory:" && !filepath.IsLocal(file)
}

var (
	wholeFile = regexp.MustCompile(`^config\.yaml: (is empty|is not YAML|has two YAML documents|cannot be read)`)
	oneLine   = regexp.MustCompile(`^config\.yaml: line \d+: `)
)

// checkRefusal sees that an error says where to look, shows no secret, and that nothing has changed.
func checkRefusal(t *testing.T, text []byte, environ string, err error) {
	t.Helper()
	var refusal *ConfigError
	if !errors.As(err, &refusal) || len(refusal.Faults) == 0 {
		t.Fatalf("%T is not a *ConfigError with faults", err)
	}
	known := slices.Collect(maps.Keys(configKeys(reflect.TypeFor[Config](), "", true)))
	for _, fault := range refusal.Faults {
		named := slices.ContainsFunc(known, func(key string) bool {
			return strings.HasPrefix(fault, "config.yaml: "+key+": ") || strings.Contains(fault, key)
		})
		if !wholeFile.MatchString(fault) && !oneLine.MatchString(fault) && !named && !strings.HasPrefix(fault, environPrefix) {
			t.Errorf("a fault names neither a setting nor a line: %q", fault)
		}
		if strings.ContainsAny(fault, "\n\r\x00\x1b") || !utf8.ValidString(fault) || len(fault) > 1000 {
			t.Errorf("a fault is not one line of text: %.2000q", fault)
		}
	}
	for _, secret := range secretsIn(text) {
		if strings.Contains(err.Error(), secret) {
			t.Errorf("the error shows the secret %q: %v", secret, err)
		}
	}
	if !bytes.Equal([]byte(readText(t, "config.yaml")), text) {
		t.Error("a refused file was rewritten")
	}
	if left := list(t, "."); !slices.Equal(left, []string{"config.yaml"}) {
		t.Errorf("a refused file has left behind %q", left)
	}
}

// secretsIn gives the values of the settings that are secret, as far as they are nowhere else in the file and like no other word.
func secretsIn(text []byte) (secrets []string) {
	var sections map[string]map[string]any
	if yaml.Unmarshal(text, &sections) != nil {
		return nil
	}
	for _, path := range [][2]string{{"account", "password"}, {"account", "access_token"}, {"account", "recovery_key"}, {"encryption", "pickle_key"}} {
		secret, _ := sections[path[0]][path[1]].(string)
		if len(secret) >= 6 && secret != Generate && bytes.Count(text, []byte(secret)) == 1 && strings.ContainsAny(secret, "0123456789") {
			secrets = append(secrets, secret)
		}
	}
	return secrets
}

// configSeeds are files as people write them, and what may go wrong with them.
func configSeeds(example string) []string {
	seeds := []string{example, completeConfig, strings.Replace(example, `password: ""`, "password: hunter2", 1),
		strings.ReplaceAll(completeConfig, "\n", "\r\n"), strings.TrimSuffix(completeConfig, "\n"), "\ufeff" + completeConfig,
		"homeserver: {address: \"http://127.0.0.1:8008\"}\naccount: {user_id: \"@bot:localhost\", password: hunter2}\n",
		"{homeserver: {address: \"http://127.0.0.1:8008\"}, account: {user_id: \"@bot:localhost\", password: hunter2}}",
		"homeserver: {adress: x}\naccount: 5\nannotate: {mode: a, shields: b}\n",
		"", "# nothing\n", "- a\n", "---\n~\n", "\x00\x01", "account: &a\n    password: *a\n", "a: {b: [c, {d: e}]}\n", "? [a]\n: b\n", "account: !!binary hunter2\n",
		"homeserver: {adress: x}\naccount: {user_id: \"@a:b\", password: pa55word1, recovery_key: pa55word2}\nencryption: {pickle_key: pa55word3, wait: 1}\n",
		"<<: {account: {password: hunter2}}\n",
	}
	for part, by := range map[string]string{
		"password: hunter2\n":                         "password: |\n        hunter2\n",
		"pickle_key: hunter2pickle":                   "pickle_key: generate",
		`recovery_key: ""`:                            "recovery_key: generate",
		"wait: 25s":                                   "wait: 9223372036854775807ns",
		"verified_users: {}":                          `verified_users: {"@a:b": "` + masterKey + `="}`,
		"operators: []":                               `operators: ["@a:b", "@c:d"]`,
		"writers: []":                                 "writers: [{type: file, filename: x, max_size: 1, format: json}]",
		`allow: ["@*:localhost"]`:                     "allow:\n        - \"@*:localhost\"\n        - '*'",
		"type: sqlite3-fk-wal-fullsync":               "type: postgres",
		`"file:data/bot.db?_txlock=immediate"`:        `":memory:"`,
		"    reset_identity: false\n":                 "",
		"encryption:\n":                               "encryption: # the keys\n",
		`    address: "http://127.0.0.1:8008"` + "\n": "  address:   'https://matrix.example.org:8448/path'\n",
	} {
		seeds = append(seeds, strings.Replace(completeConfig, part, by, 1))
	}
	return seeds
}
