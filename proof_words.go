package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"
	"unicode"

	"maunium.net/go/mautrix/id"

	"sendertrust/bot"
	"sendertrust/cryptohook"
)

// What --verify-proof says. It needs no settings, no database and no network.

// longestProof is more than any proof has, in bytes. What is longer is not read on.
const longestProof = 2 << 20

// verifyProof checks a file and says what it proves. It returns the exit code.
func verifyProof(path, givenKey string, stdout, stderr io.Writer) int {
	usage := func(format string, args ...any) int {
		fmt.Fprint(stderr, printable(fmt.Sprintf("sendertrust: "+format+"\n", args...)))
		return exitSetup
	}
	switch {
	case path == "":
		return usage("--master-key is for --verify-proof; name the file with the proof as well")
	case givenKey == "":
		return usage("--verify-proof needs the bot's master key: write --master-key and the key that the bot shows when somebody says !trust status")
	}
	key, err := bot.ParseMasterKey(givenKey)
	if err != nil {
		return usage("--master-key: %q %v; write the 43 characters that the bot shows when somebody says !trust status", givenKey, err)
	}
	file, err := readProof(path)
	if err != nil {
		return usage("%v", err)
	}
	proof, err := cryptohook.VerifyProof(file, key)
	if err != nil {
		fmt.Fprint(stderr, printable(proofFault(path, err)+"\n"))
		return exitFailed
	}
	fmt.Fprint(stdout, printable(proofText(proof)))
	return exitOK
}

func readProof(path string) ([]byte, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	return io.ReadAll(io.LimitReader(file, longestProof))
}

// proofFault says what is wrong with a file, after the field that it is wrong in.
func proofFault(path string, err error) string {
	fault, ok := errors.AsType[*cryptohook.ProofError](err)
	switch {
	case !ok:
		return path + ": " + err.Error()
	case fault.Field == "":
		return path + ": " + fault.Fault
	default:
		return fault.Field + ": " + fault.Fault
	}
}

// printable keeps what a file says from changing what a terminal shows.
func printable(text string) string {
	var out strings.Builder
	for _, r := range text {
		if unicode.IsPrint(r) || r == '\n' {
			out.WriteRune(r)
		} else {
			fmt.Fprintf(&out, "<U+%04X>", r)
		}
	}
	return out.String()
}

// verdictWords say what each verdict means of the sender, %s.
var verdictWords = map[cryptohook.Code]string{
	cryptohook.CodeVerified:              "The message is from %s: a device of theirs made the encryption it was sent with, and the bot's operators have verified this person.",
	cryptohook.CodeUnverifiedIdentity:    "The message was sent by a device that the account %s vouches for. Nobody has verified for the bot who is behind the account.",
	cryptohook.CodeIdentityChanged:       "The message was sent by a device that the account %s vouches for or vouched for, and by the bot's notes the account's encryption identity is not the one that the bot saw first. People get a new one when they lose their keys; somebody who takes an account over gets one, too.",
	cryptohook.CodeVerificationViolation: "WARNING: by the bot's notes the account %s was verified, and the encryption identity that it has now is not the verified one. Do not rely on the message before you have asked this person in another way.",
	cryptohook.CodeUnsignedDevice:        "WARNING: the message was sent by a device that the account %s does not vouch for. Whoever knows the account's password, or runs its server, can add such a device.",
}

// proofText says in words what a proof is about, what it proves, and what not.
func proofText(proof *cryptohook.ProofReport) string {
	var out strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&out, format+"\n", args...) }
	line("The proof is genuine: %s has made it, and nobody has changed it since.", proof.BotUserID)
	line("")
	line("It is about the message %s of %s in the room %s.", proof.EventID, moment(proof.SentAt), proof.RoomID)
	line("Verdict: %s", proof.Code)
	if proof.Sender == proof.BotUserID {
		line("The message is from the bot's own account.")
	} else {
		line(verdictWords[proof.Code], proof.Sender)
	}
	line("")
	line("What the file proves:")
	for _, fact := range proof.Proven {
		line("- %s", factWords(fact, proof))
	}
	line("")
	line("What it does not prove:")
	for _, fact := range proof.NotProven {
		line("- %s", factWords(fact, proof))
	}
	line("")
	line("Details:")
	for _, detail := range proofDetails(proof) {
		line("  %-30s %s", detail[0]+":", detail[1])
	}
	return out.String()
}

// factWords say what one fact means.
func factWords(fact cryptohook.ProofFact, proof *cryptohook.ProofReport) string {
	switch fact {
	case cryptohook.ProvenBot:
		return fmt.Sprintf("The device %s, which belongs to the bot with the master key that you gave, has signed everything in the file. (The master key is the key that an account is known by: it signs the keys of the account's devices.)", proof.BotDeviceID)
	case cryptohook.ProvenDevice:
		return fmt.Sprintf("The keys in the file are those of one device, which calls itself %s of %s and has signed them itself.", proof.DeviceID, proof.Sender)
	case cryptohook.ProvenOwner:
		return fmt.Sprintf("The device belongs to the owner of the master key %s: that key's signatures are in the file.", grouped(proof.MasterKey))
	case cryptohook.ProvenVerified:
		by := "somebody whom its operators trust has compared the keys"
		if proof.VerifiedBy == cryptohook.VerifiedByPin {
			by = "its operators have written the key into its settings"
		}
		return fmt.Sprintf("The bot has verified this master key: its signature on the key is in the file. It does that when %s.", by)
	case cryptohook.ProvenVerdict:
		if restsOnNotes(proof.Code) {
			return "The verdict is right if the bot's notes of earlier are: it was worked out anew from them and from the keys and signatures in the file."
		}
		return "The verdict is right: it was worked out anew from the keys and signatures in the file."
	case cryptohook.UnprovenText:
		return "What the message says. Everybody in the room has the key that messages are encrypted with, and could have written any text."
	case cryptohook.UnprovenEvent:
		return "That it is this message in this room. Only the bot's signature names them; it had them from its homeserver."
	case cryptohook.UnprovenOrigin:
		return "That the message was really sent from this device. Only the bot saw the device hand over the key of the message; the file holds the bot's word for it."
	case cryptohook.UnprovenTimes:
		return "The times. They are those of the bot's clock and of the bot's homeserver."
	case cryptohook.UnprovenHistory:
		words := "Which master keys the sender had before, and whether somebody verified one of them: that is what the bot has noted, and only its word."
		if restsOnNotes(proof.Code) {
			words += " This verdict rests on it."
		}
		return words
	case cryptohook.UnprovenPerson:
		return "Which person has the master key. Ask them for theirs in another way, and compare it."
	case cryptohook.UnprovenOwner:
		return fmt.Sprintf("That the device is one of %s: nothing that this account signed says so.", proof.Sender)
	case cryptohook.UnprovenOutdated:
		return "That the keys were up to date: the bot knew that the account's devices had changed, and had no answer yet."
	default:
		return string(fact)
	}
}

// restsOnNotes says that a verdict is about the past, of which nothing is signed.
func restsOnNotes(code cryptohook.Code) bool {
	return code == cryptohook.CodeIdentityChanged || code == cryptohook.CodeVerificationViolation
}

// proofDetails are names and values for those who compare them.
func proofDetails(proof *cryptohook.ProofReport) [][2]string {
	details := [][2]string{
		{"Sender", proof.Sender.String()},
		{"Sender's device", proof.DeviceID.String()},
		{"Device's signing key", grouped(proof.SigningKey)},
		{"Device's encryption key", grouped(id.Ed25519(proof.SenderKey))},
		{"Device's master key", grouped(proof.MasterKey)},
		{"Account's master key", grouped(proof.TodaysMasterKey)},
		{"First master key the bot saw", grouped(proof.FirstMasterKey)},
		{"Master key in the settings", grouped(proof.PinnedKey)},
		{"Session", proof.SessionID.String()},
		{"Session's key came", string(proof.Source)},
		{"Session's key received", moment(proof.ReceivedAt)},
		{"Bot", proof.BotUserID.String()},
		{"Bot's device", proof.BotDeviceID.String()},
		{"Bot's master key", grouped(proof.BotMasterKey)},
		{"Proof made", moment(proof.MadeAt)},
	}
	if proof.Withdrawn {
		details = append(details, [2]string{"Verification", "was withdrawn"})
	}
	return slices.DeleteFunc(details, func(detail [2]string) bool { return detail[1] == "" })
}

func moment(at time.Time) string {
	if at.IsZero() {
		return "an unknown time"
	}
	return at.UTC().Format("2006-01-02 15:04:05 UTC")
}

// grouped writes a key in groups of four, as the bot shows it, so that people can compare it.
func grouped(key id.Ed25519) string {
	var groups []string
	for group := range slices.Chunk([]rune(key.String()), 4) {
		groups = append(groups, string(group))
	}
	return strings.Join(groups, " ")
}
