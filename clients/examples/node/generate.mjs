// Stream an answer with stubs made from the .proto files at run time.
//
//   npm install && node generate.mjs 127.0.0.1:7460 ../../../protos "What is modelyard?"
import grpc from "@grpc/grpc-js";
import loader from "@grpc/proto-loader";

const [address = "127.0.0.1:7460", protos = "../../../protos", prompt = "What is modelyard?"] = process.argv.slice(2);

const definition = loader.loadSync("modelyard/v1/orchestrator.proto", {
  includeDirs: [protos],
  enums: String,
  longs: String,
});
const { Orchestrator } = grpc.loadPackageDefinition(definition).modelyard.v1;
const orchestrator = new Orchestrator(address, grpc.credentials.createInsecure());

const call = orchestrator.Generate(
  {
    input: { messages: [{ role: "ROLE_USER", content: [{ text: prompt }] }] },
    taskType: "TASK_TYPE_CHAT",
  },
  { deadline: Date.now() + 30_000 },
);
call.on("data", ({ delta, summary }) => {
  if (delta) process.stdout.write(delta.text);
  if (summary) console.log(`\n[${summary.serverId}/${summary.model}, ${summary.usage.completionTokens} tokens]`);
});
call.on("error", (error) => {
  // The reason is a google.rpc.ErrorInfo in error.metadata ("grpc-status-details-bin").
  console.error(`${grpc.status[error.code]}: ${error.details}`);
  process.exitCode = 1;
});
call.on("end", () => orchestrator.close());
