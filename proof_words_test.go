package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"sendertrust/cryptohook"
)

const goodProof = "cryptohook/testdata/proof.json"

// proofKeys gives the master key of the bot that made the proof, and of the sender.
func proofKeys(t *testing.T) (botKey, aliceKey string) {
	t.Helper()
	var proof struct {
		Bot struct {
			MasterKey struct {
				Keys map[string]string `json:"keys"`
			} `json:"master_key"`
		} `json:"bot"`
		Identity struct {
			FirstMasterKey string `json:"first_master_key"`
		} `json:"identity"`
	}
	file, err := os.ReadFile(goodProof)
	if err == nil {
		err = json.Unmarshal(file, &proof)
	}
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range proof.Bot.MasterKey.Keys {
		botKey = key
	}
	return botKey, proof.Identity.FirstMasterKey
}

func TestGoodProofIsExplained(t *testing.T) {
	key, aliceKey := proofKeys(t)
	spaced := strings.Join([]string{key[:4], key[4:8], key[8:]}, " ")
	for _, given := range []string{key, key + "=", " " + spaced + "\n"} {
		code, stdout, stderr := program(t, "--verify-proof", goodProof, "--master-key", given)
		if code != exitOK || stderr != "" {
			t.Fatalf("%q: %d, %q", given, code, stderr)
		}
		for _, want := range []string{
			"The proof is genuine: @bot:test has made it", "$event1", "!room:test", "Verdict: verified\n", "The message is from @alice:test",
			"What the file proves:\n- ", "What it does not prove:\n- What the message says.", "\n- That it is this message in this room.", aliceKey[:4] + " " + aliceKey[4:8] + " ", "2023-11-14 22:13:20 UTC",
		} {
			if !strings.Contains(stdout, want) {
				t.Errorf("%q is not in\n%s", want, stdout)
			}
		}
	}
}

func TestBadProofIsRefusedWithTheFieldNamed(t *testing.T) {
	key, aliceKey := proofKeys(t)
	good, err := os.ReadFile(goodProof)
	if err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct{ file, key, want string }{
		"changed":          {strings.Replace(string(good), "!room:test", "!other:test", 1), key, "event.room_id: was changed"},
		"another bot":      {string(good), aliceKey, "bot.master_key: is "},
		"more":             {strings.Replace(string(good), "{", `{"more":1,`, 1), key, "more: is no field of a proof"},
		"no JSON":          {"hello", key, "FILE: is not valid JSON"},
		"empty":            {"", key, "FILE: is not valid JSON"},
		"endless":          {strings.Repeat(" ", 3<<20), key, "FILE: is longer than 1048576 bytes"},
		"escape sequences": {strings.Replace(string(good), "{", `{"\u001b[2J\u202e":1,`, 1), key, `["\x1b[2J\u202e"]: is no field of a proof`},
	} {
		path := filepath.Join(t.TempDir(), "proof.json")
		if err := os.WriteFile(path, []byte(tc.file), 0o600); err != nil {
			t.Fatal(err)
		}
		code, stdout, stderr := program(t, "--verify-proof", path, "--master-key", tc.key)
		if want := strings.Replace(tc.want, "FILE", path, 1); code != exitFailed || stdout != "" || !strings.HasPrefix(stderr, want) {
			t.Errorf("%s: %d, %q, %q", name, code, stdout, stderr)
		}
	}
}

func TestProofIsCheckedOnlyWithAFileAndAKey(t *testing.T) {
	key, _ := proofKeys(t)
	for name, tc := range map[string]struct {
		args []string
		want string
	}{
		"no key":           {[]string{"--verify-proof", goodProof}, "--verify-proof needs the bot's master key"},
		"no file":          {[]string{"--master-key", key}, "--master-key is for --verify-proof"},
		"no base64":        {[]string{"--verify-proof", goodProof, "--master-key", "!!!"}, `--master-key: "!!!" is not base64; write the 43 characters`},
		"a short key":      {[]string{"--verify-proof", goodProof, "--master-key", "QUJD"}, `--master-key: "QUJD" has 3 bytes instead of 32`},
		"a file not there": {[]string{"--verify-proof", "nothing.json", "--master-key", key}, "open nothing.json: no such file"},
		"a folder":         {[]string{"--verify-proof", "cryptohook", "--master-key", key}, "read cryptohook: is a directory"},
		"more words":       {[]string{"--verify-proof", goodProof, "--master-key", key[:4], key[4:]}, ""},
	} {
		code, stdout, stderr := program(t, tc.args...)
		if code != exitSetup || stdout != "" || !strings.Contains(stderr, tc.want) {
			t.Errorf("%s: %d, %q, %q", name, code, stdout, stderr)
		}
	}
}

// No settings and no database: there are none where this runs, and none are left.
func TestProofIsCheckedWithoutAnythingElse(t *testing.T) {
	key, _ := proofKeys(t)
	path, err := filepath.Abs(goodProof)
	if err != nil {
		t.Fatal(err)
	}
	t.Chdir(t.TempDir())
	if code, _, stderr := program(t, "--verify-proof", path, "--master-key", key); code != exitOK {
		t.Errorf("%d, %q", code, stderr)
	}
	left, err := os.ReadDir(".")
	if err != nil || len(left) != 0 {
		t.Errorf("it has left %v, %v", left, err)
	}
}

func TestEveryVerdictThatIsProvenHasItsWords(t *testing.T) {
	for _, code := range []cryptohook.Code{
		cryptohook.CodeVerified, cryptohook.CodeUnverifiedIdentity, cryptohook.CodeIdentityChanged, cryptohook.CodeVerificationViolation, cryptohook.CodeUnsignedDevice,
	} {
		if !strings.Contains(verdictWords[code], "%s") {
			t.Errorf("%s has no words", code)
		}
	}
	for _, fact := range []cryptohook.ProofFact{
		cryptohook.ProvenBot, cryptohook.ProvenDevice, cryptohook.ProvenOwner, cryptohook.ProvenVerified, cryptohook.ProvenVerdict,
		cryptohook.UnprovenText, cryptohook.UnprovenEvent, cryptohook.UnprovenOrigin, cryptohook.UnprovenTimes, cryptohook.UnprovenHistory, cryptohook.UnprovenPerson,
		cryptohook.UnprovenOwner, cryptohook.UnprovenOutdated,
	} {
		if words := factWords(fact, &cryptohook.ProofReport{}); words == string(fact) {
			t.Errorf("%s has no words", fact)
		}
	}
}

// That an account had another key before, or was verified, nobody has signed.
func TestWhatWasBeforeIsTheBotsWord(t *testing.T) {
	for _, code := range []cryptohook.Code{cryptohook.CodeIdentityChanged, cryptohook.CodeVerificationViolation} {
		said := proofText(&cryptohook.ProofReport{
			Code: code, Sender: "@alice:test", BotUserID: "@bot:test",
			Proven: []cryptohook.ProofFact{cryptohook.ProvenVerdict}, NotProven: []cryptohook.ProofFact{cryptohook.UnprovenHistory},
		})
		for _, want := range []string{"by the bot's notes the account", "The verdict is right if the bot's notes of earlier are", "only its word. This verdict rests on it."} {
			if !strings.Contains(said, want) {
				t.Errorf("%s: %q is not in\n%s", code, want, said)
			}
		}
	}
}
