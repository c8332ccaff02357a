package e2e

import (
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"

	"gopkg.in/yaml.v3"

	"sendertrust/cryptohook"
	"sendertrust/e2e/element"
)

var update = flag.Bool("update", false, "write docs/differences.md anew")

// differencesRow is one message of one scenario: testdata/differences.yaml says what is expected, the test finds out what is.
type differencesRow struct {
	Name     string
	Scenario string
	// Ours is the bot's code. Element and Mautrix are what those two say, as cells of the table.
	Ours, Element, Mautrix string
	// Why says why ours is right, where it differs from Element.
	Why string

	played  bool
	differs bool
}

// differencesTable is what the plays fill.
type differencesTable struct {
	lock sync.Mutex
	rows []*differencesRow
}

func readDifferences(t *testing.T) *differencesTable {
	t.Helper()
	table := new(differencesTable)
	decoder := yaml.NewDecoder(bytes.NewReader(must(os.ReadFile("testdata/differences.yaml"))(t)))
	decoder.KnownFields(true)
	ok(t, decoder.Decode(&table.rows))
	return table
}

// row takes a row, once.
func (table *differencesTable) row(t *testing.T, name string) *differencesRow {
	t.Helper()
	table.lock.Lock()
	defer table.lock.Unlock()
	i := slices.IndexFunc(table.rows, func(row *differencesRow) bool { return row.Name == name })
	if i < 0 || table.rows[i].played {
		t.Fatalf("testdata/differences.yaml has no row %q, or it was played before", name)
	}
	table.rows[i].played = true
	return table.rows[i]
}

// elementSays is what Element's crypto has to say of a message.
type elementSays struct {
	element.Shields
	// failure is its code for why the message cannot be decrypted.
	failure string
}

func (says elementSays) cell() string {
	switch {
	case says.failure != "":
		return "cannot read it: `" + says.failure + "`"
	case says.Lax == element.Shield{}:
		return "nothing"
	case says.Lax.Reason == "":
		return fmt.Sprintf("%s (strict: %s)", says.Lax.Colour, says.Strict.Colour)
	default:
		return fmt.Sprintf("%s, `%s` (strict: %s)", says.Lax.Colour, says.Lax.Reason, says.Strict.Colour)
	}
}

// agreesWith says whether Element shows what the bot says: the same colours, and, where there is a warning, the same reason.
func (says elementSays) agreesWith(code cryptohook.Code) bool {
	lax, strict := string(code.LaxShield()), string(code.StrictShield())
	switch {
	case says.failure != "":
		return code == cryptohook.CodeUnableToDecrypt
	case says.Lax == element.Shield{}:
		return code == cryptohook.CodeNotEncrypted
	default:
		return says.Lax.Colour == lax && says.Strict.Colour == strict && (lax == "none" || says.Lax.Reason == string(code))
	}
}

func oursCell(code cryptohook.Code) string {
	return fmt.Sprintf("`%s`: %s (strict: %s)", code, code.LaxShield(), code.StrictShield())
}

// markdown writes the whole document.
func (table *differencesTable) markdown(t *testing.T, root string) []byte {
	t.Helper()
	var differ int
	for _, row := range table.rows {
		if row.differs {
			differ++
		}
	}
	var doc bytes.Buffer
	fmt.Fprintf(&doc, differencesIntroduction, len(table.rows), versionIn(t, root, "e2e/synapse/requirements.txt", `(?m)^matrix-synapse==(\S+)$`),
		lockedVersion(t, root, "matrix-js-sdk"), lockedVersion(t, root, "@matrix-org/matrix-sdk-crypto-wasm"),
		versionIn(t, root, "go.mod", `(?m)^\s*maunium.net/go/mautrix v(\S+)$`), differ)
	for i, row := range table.rows {
		why := row.Why
		if !row.differs {
			why = "the same"
		}
		cells := []string{fmt.Sprint(i + 1), row.Scenario, row.Element, row.Mautrix, oursCell(cryptohook.Code(row.Ours)), why}
		for _, cell := range cells {
			fmt.Fprintf(&doc, "| %s ", strings.Join(strings.Fields(cell), " "))
		}
		doc.WriteString("|\n")
	}
	return doc.Bytes()
}

func versionIn(t *testing.T, root, file, pattern string) string {
	t.Helper()
	found := regexp.MustCompile(pattern).FindSubmatch(must(os.ReadFile(filepath.Join(root, file)))(t))
	if found == nil {
		t.Fatalf("%s does not have %s", file, pattern)
	}
	return string(found[1])
}

func lockedVersion(t *testing.T, root, module string) string {
	t.Helper()
	var lock struct {
		Packages map[string]struct{ Version string }
	}
	ok(t, json.Unmarshal(must(os.ReadFile(filepath.Join(root, "e2e/element/package-lock.json")))(t), &lock))
	return lock.Packages["node_modules/"+module].Version
}

const differencesIntroduction = `# What Element shows, and what sendertrust says

Matrix apps put a coloured shield beside a message when something about its sender is doubtful. sendertrust answers the message with
words instead. This table holds the two side by side: %d messages, each sent into a room in which three watched at the same time.

- **Element**: the encryption inside the Element apps. "none" is no warning, "grey" a mild one, "red" a loud one; the word behind it is the
  reason. In brackets is the colour for somebody who wants strict warnings: then everybody whom they have not verified is red. "nothing"
  means that the app is told nothing about the sender.
- **mautrix**: the library that sendertrust and many other bots are built on, as it comes, without sendertrust's part. The word is the trust
  that a bot finds on the message: ` + "`cross-signed-verified`" + ` and ` + "`cross-signed-tofu`" + ` for a confirmed device of somebody who is verified, or not;
  ` + "`cross-signed-untrusted`" + ` when the account's keys are not the first that were seen; ` + "`unverified`" + ` for a device that is not confirmed;
  ` + "`unknown-device`" + ` for one that the server does not show; ` + "`backup`" + ` for a key from there. What is in brackets says why it could not read the message.
- **sendertrust**: the answer of the bot, as it stands after its corrections, since it corrects what it said when it learns more. What the
  codes mean is in the [README](../README.md#what-the-answers-mean). The colours are meant as Element's are.

To *verify* somebody is to check, over another channel, that an account is theirs. Whenever that happens here, all three do it. A *confirmed*
device is one whose owner has said, with the account's own keys, that it is theirs; apps do this when one sets up encryption, or compares
emoji after a new login. A *reset* replaces the account's own keys by new ones: people do that who have lost all their devices, and so does
somebody who has taken an account over. A message is opened with a *message key*, which its sender's device gives out once and then uses for
many messages; a *fresh* one is new.

Compared on Synapse %s: matrix-js-sdk %s with matrix-sdk-crypto-wasm %s (Element's part), and mautrix-go %s. In %d rows
sendertrust differs from Element, and the last column says why it should.

This file is written by a test that plays every scenario anew, and that fails when one of the three says anything else than this. To
write it again: ` + "`go test -tags goolm -run TestDifferencesFromElement ./e2e -update`" + `, after ` + "`e2e/setup.sh`" + `.

| | What happens | Element | mautrix | sendertrust | Where they differ, why ours is right |
|---|---|---|---|---|---|
`

func TestDifferencesFromElement(t *testing.T) {
	t.Parallel()
	w := theWorld(t)
	table := readDifferences(t)
	whole := t.Run("played", func(t *testing.T) { playDifferences(t, w, table) })
	var left []string
	for _, row := range table.rows {
		if !row.played {
			left = append(left, row.Name)
		}
	}
	if part := strings.Contains(flag.Lookup("test.run").Value.String(), "/"); part && whole && len(left) > 0 {
		t.Skipf("only a part was asked for; not played: %q", left)
	}
	if len(left) > 0 || !whole {
		t.Fatalf("the table is not written, nor compared; not played: %q", left)
	}
	made, file := table.markdown(t, w.root), filepath.Join(w.root, "docs", "differences.md")
	if *update {
		ok(t, os.MkdirAll(filepath.Dir(file), 0o755))
		ok(t, os.WriteFile(file, made, 0o644))
		return
	}
	if kept, err := os.ReadFile(file); err != nil || !bytes.Equal(kept, made) {
		t.Errorf("docs/differences.md is not what was found out just now (%v). Look at why, then run this test with -update. It would be:\n%s", err, made)
	}
}
